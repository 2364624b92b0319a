"""How a model's own files turn conversations and texts into token ids: its tokenizer and its chat template.

Training and serving read them here, so that a model is asked in the tokens that it was trained with. It refuses to know
masks, requests, engines and torch.
"""
