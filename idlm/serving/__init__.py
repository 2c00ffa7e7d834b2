"""An OpenAI-compatible server: HTTP in one process, the engine in another.

client -> app (routes) -> guard (limits, keys) -> prompts (text to ids) -> client (of the engine)
                                                                               |  messages, over a socket
                                                                            worker (the engine's process)
"""
