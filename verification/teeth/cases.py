"""Which of many test cases are asked of a planted fault: some of each kind, in their order.

Works on pytest's collected items; knows nothing of faults or of what a test computes.
"""


def a_few_of_each(items: list, most: int) -> list:
    """So many cases of each test, in their order."""
    cases = {}
    for item in items:
        cases.setdefault((item.path, item.originalname), []).append(item)
    kept = {id(item) for of_one in cases.values() for item in spread(of_one, most)}
    return [item for item in items if id(item) in kept]


def of_few_fixtures(items: list, most: int) -> list:
    """The cases of some parameters of each fixture that many share: making one takes seconds."""
    parameters = {}
    for item in items:
        for name, index in _shared_fixtures(item):
            parameters.setdefault((item.path, name), set()).add(index)
    kept = {key: spread(sorted(found), most) for key, found in parameters.items()}
    return [
        item
        for item in items
        if all(index in kept[item.path, name] for name, index in _shared_fixtures(item))
    ]


def _shared_fixtures(item: object) -> list:
    """The parametrised fixtures of a module that a test takes, each with its parameter's number."""
    if not hasattr(item, "callspec"):
        return []
    definitions = item._fixtureinfo.name2fixturedefs
    return [
        (name, index)
        for name, index in item.callspec.indices.items()
        if name in definitions and definitions[name][-1].scope == "module"
    ]


def spread(cases: list, most: int) -> list:
    """So many of them, the first and the last among them."""
    if len(cases) <= most:
        return cases
    return [cases[i * (len(cases) - 1) // (most - 1)] for i in range(most)]
