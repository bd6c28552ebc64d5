"""Connects projects of Label Studio, stores their events, and reads back missed ones."""
