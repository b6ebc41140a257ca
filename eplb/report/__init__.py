"""What a recording shows: figures on a page, and spans in a trace."""
