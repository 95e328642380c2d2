"""The paper's method: attention, identities, projectors and adapters. Knows no host."""
