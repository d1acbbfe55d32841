"""How machine code is built, cached and loaded."""
