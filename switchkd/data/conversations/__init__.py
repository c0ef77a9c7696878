"""Conversations about images: their readers, their encoding and checks, and the questions made from labelled images."""
