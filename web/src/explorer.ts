import { mount } from "svelte";
import ExplorerPage from "./ExplorerPage.svelte";
import "./app.css";

mount(ExplorerPage, { target: document.getElementById("app") as HTMLElement });
