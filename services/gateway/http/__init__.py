"""The HTTP edge for clients that speak OpenAI's protocol. It serves chat and models, and knows no engine."""
