"""Serve a trained run over HTTP, with a model for each user (`metakern serve`).

app, schema     routes of the OpenAI interface and of the users, their requests and responses
engine          continuous batching: one thread that decodes the replies of all users together
stack           a model whose layers hold the weights of many users, and its cache
sampling        draws the next token of each reply
teacher         adapts users' models in the background
store           users, exchanges and tokens in SQLite; adapted weights in safetensors
limits, metrics, server     sizes and rates; Prometheus; `metakern serve`
"""
