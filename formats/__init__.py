"""What files hold: rows of datasets and their errors, token columns, strict JSON, manifests and revisions.

Pure. The gateway, the trainer and inference read by these rules, so each rule exists once. It refuses to know services,
protobuf, databases and where a file lies. Only its room `prompts` knows tokenizers and chat templates.
"""
