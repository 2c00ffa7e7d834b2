"""Models: loading and checking checkpoints, gated LoRA, the attention function, `Idlm`."""
