"""Training shards to an adapter: ``python -m trainer train``.

``samples`` says what sample number n is, from (seed, n) alone; ``features`` computes once what
the frozen encoders say of the photos, ``cache`` keeps it; ``objective`` is Eq. 3; ``loop`` the
order of it all, ``state`` what a resumed run starts from.
"""
