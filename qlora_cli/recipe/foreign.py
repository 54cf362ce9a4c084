from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignName:
    tool: str
    here: str | None
    advice: str = ""
    same_value: bool = True


_T = {"lora_r": ForeignName("PEFT", "lora.rank"), "datasets": ForeignName("axolotl", "dataset", same_value=False)}


def foreign_name(key: str) -> ForeignName | None:
    return _T.get(key)


def explain(key: str, name: ForeignName) -> str:
    return f"`{key}` is {name.tool}'s name; here it is `{name.here}`"


def foreign_value(field: str, value: str) -> str | None:
    return None
