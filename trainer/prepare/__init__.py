"""Photos to training shards: ``python -m trainer prepare INPUT OUTPUT``.

``stages`` holds what is done to each part of the input, ``engines`` who does it, ``manifest``
what is already done, ``sources`` what the input holds, ``group`` who is who, ``run`` the order.
"""
