"""The Titanic, end to end: a production-grade ML system written in notebooks.

Modules are imported when they are first used: `from titanic_mlops import contract, sources`.
"""

__version__ = "0.1.0"

MODULES = {
    **dict.fromkeys(("errors", "settings", "logs", "store"), "ground"),
    **dict.fromkeys(("contract", "sources", "quality", "features", "targets", "rowcheck", "leaks"), "data"),
    **dict.fromkeys(("strategies", "contract_versions"), "data"),
    **dict.fromkeys(("train", "evaluate", "bundle", "gate", "registry", "plots", "report"), "model"),
    **dict.fromkeys(("fairness", "robustness", "conditions", "selftest", "ledger", "lineage", "cards"), "model"),
    **dict.fromkeys(("background",), "model"),
    **dict.fromkeys(("kernels", "configuration", "workbench", "steps", "cache", "execution"), "flow"),
    **dict.fromkeys(("records", "pipeline", "services", "reporting", "verify", "figures"), "flow"),
    **dict.fromkeys(("fastpath", "http", "predict", "bulk", "app", "origins", "models", "server"), "serve"),
    **dict.fromkeys(("explain", "page", "security", "access", "protocols"), "serve"),
    **dict.fromkeys(("predictions", "segments", "record", "columns", "batch", "ray_app", "ray_batch"), "serve"),
    **dict.fromkeys(("drift", "alerts", "monitor", "incident", "shifts", "rehearsal"), "watch"),
    **dict.fromkeys(("cli", "contract_commands", "gate_commands", "registry_commands", "document_commands"), "face"),
    **dict.fromkeys(("serve_commands", "key_commands", "score_commands", "watch_commands", "screen"), "face"),
    **dict.fromkeys(("drill_commands",), "face"),
}


def __getattr__(name: str):
    if name in MODULES:
        from importlib import import_module

        return import_module(f"titanic_mlops.{MODULES[name]}.{name}")
    raise AttributeError(f"module 'titanic_mlops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
