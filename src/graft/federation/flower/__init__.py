"""The same federation over Flower: its SuperLink and SuperNodes carry the messages, as processes of their own.

    launching   graft federate --serve and --join: starts Flower's processes and waits for them
    apps        what Flower's processes run: a ServerApp and a ClientApp
    grid        messages to clients by name, although Flower knows nodes by number, and a client that joins again is another node
    guard       a process that ends with the one that started it

flwr is imported in these files alone, when they are used.
"""
