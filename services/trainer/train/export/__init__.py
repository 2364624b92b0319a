"""The model that ships, the proof that it is the trained one, and where it comes from. It knows no step."""
