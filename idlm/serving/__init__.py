"""An OpenAI-compatible server: HTTP in one process, the engine in another.

app                   routes, from the body of a request to its response
schema, schema_chat   bodies of requests
responses             bodies of responses
limits                connections, headers, API keys, bodies; the quota of the engine's queue
prompts               text to token ids, in a thread
jobs                  the samples of a request, from admission to their end
answers               responses, whole or streamed
tools                 tool calls in the output
client                the engine process as the server sees it
supervisor            restarts the engine process
wire                  messages between the two processes
worker                the engine process
observe               logs and metrics
server                the socket and the signals
"""
