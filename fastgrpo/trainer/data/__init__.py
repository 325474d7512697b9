"""Users' tables, and the way from text to what a forward pass needs and back."""
