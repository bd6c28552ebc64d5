"""Labelled data sets in the formats of other programs: reading and writing."""
