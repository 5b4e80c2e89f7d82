"""Plain torch, forward only, any dtype: the specification of every operation, its oracle and its fallback."""
