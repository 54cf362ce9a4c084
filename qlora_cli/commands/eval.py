"""`qlora eval`."""


def list_tasks(*a, **k):
    print(a, k)
    return 0


def evaluate(*a, **k):
    print(a, k)
    return 0
