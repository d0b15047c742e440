"""The training API: compatible with clients of the Tinker API (its wire protocol; nothing of the client's code is used)."""
