"""Serve a trained run over HTTP, with a model for each user (`metakern serve`).

The modules, from HTTP to the disk:

    server                    opens the run and the store, and answers requests until the process is told to end
    app, completions          the application: users and operation, OpenAI's interface
    callers, limits, schema   who sends a request, how much and how often; requests and responses
    text, metrics             text of tokens as they come; counters for Prometheus
    service                   all that follows, and users' models in memory
    engine                    continuous batching: one thread that decodes the replies of all users together
    stack, sampling           a model whose layers hold the weights of many users; draws of tokens
    pretrained                decodes with a model of Hugging Face in a stack
    teacher                   adapts users' models in the background
    store                     users, exchanges and tokens in SQLite; adapted weights in safetensors
"""
