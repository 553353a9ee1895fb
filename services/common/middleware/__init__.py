"""Plain ASGI middleware, each a class of its own; services/common/app.py puts them in order."""
