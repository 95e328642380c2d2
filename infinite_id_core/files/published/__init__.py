"""Published adapters: IP-Adapter, FaceID, InstantID, PuLID. Recognised by contents alone."""
