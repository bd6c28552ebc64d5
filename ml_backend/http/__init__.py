"""Serves HTTP: Flask blueprints that decode a request, hand it on, and encode the answer."""
