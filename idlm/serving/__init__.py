"""An OpenAI-compatible server: HTTP in one process, the engine in another.

schema    bodies of requests         limits   connections, headers, keys, bodies, the queue app
routes: the way of a request, from its body to its answer prompts   text to ids                jobs
admission of its samples        answers   whole, or as a stream client    the engine's process, as
the server sees it; supervisor keeps it running wire      what the two processes say to each other
worker    the engine's process observe   logs and metrics           server   the socket and the
signals
"""
