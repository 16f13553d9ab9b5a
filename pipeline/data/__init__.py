"""Structures and labels from the field's files, as one `System` record with a content id."""
