"""Files that are not trusted on the way in and never lost on the way out."""
