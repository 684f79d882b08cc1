"""What a low-rank change computes: one method, one paper, one file."""
