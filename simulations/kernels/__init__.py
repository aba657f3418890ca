"""How the clients of one chunk are trained: one module a kernel, one interface for all."""
