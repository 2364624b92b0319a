"""From conversations and texts to token ids, by processes that run the model's own tokenizer and chat template.

It refuses to know engines and tenants.
"""
