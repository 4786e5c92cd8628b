"""The value and what composes it: ops, combinators, couplings and their laws. Nothing here knows autograd."""
