"""OpenAI's interface over the service: what comes in, what goes out, who may do what. Imports no torch."""
