"""Examines machine, server, Label Studio and project, and names the remedy for each fault."""
