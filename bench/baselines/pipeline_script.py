"""What `titanic run` does, as the plain script that one would write instead: no notebooks, no Prefect, no cache.

The same passengers, checks, folds, fits, figures, bundle, report, MLflow runs and registry; one process.

    python bench/baselines/pipeline_script.py FOLDER [overrides]
"""

import sys
import time
from pathlib import Path

START = time.perf_counter()


def main(folder: Path, overrides: list[str]) -> None:
    from titanic_mlops.flow.configuration import load
    from titanic_mlops.ground.settings import settings
    from titanic_mlops.model.registry import CHAMPION, Registry, open_tracking

    own = settings(store=folder)
    [config] = load(overrides)
    client = open_tracking(own)

    import json

    import numpy as np
    from mlflow.entities import Metric, Param

    from titanic_mlops.data.features import CATEGORICAL, NUMERIC, feature_frame
    from titanic_mlops.data.leaks import people, refuse_peeking, refuse_revealing, refuse_shared
    from titanic_mlops.data.quality import data_docs, judge
    from titanic_mlops.data.sources import canonical, read, snapshot
    from titanic_mlops.ground.store import Artifacts
    from titanic_mlops.model import conditions, plots
    from titanic_mlops.model.bundle import Bundle, Lineage, describe, require_parity, to_onnx, write_bundle
    from titanic_mlops.model.evaluate import choose, estimate, evaluate, nested, surprises
    from titanic_mlops.model.gate import Policy
    from titanic_mlops.model.report import Champion, Quality, Report, Scored, TableRule, render_report
    from titanic_mlops.model.robustness import examine
    from titanic_mlops.model.train import (
        Candidate,
        cross_validate,
        fit,
        fit_on,
        holdout_mask,
        inner_validate,
        probabilities,
        size_of,
    )

    experiment = client.get_experiment_by_name(own.mlflow_experiment).experiment_id
    parent = client.create_run(experiment, run_name="script").info.run_id
    out = folder / "out"
    out.mkdir(parents=True)

    def log(name: str, params: dict, metrics: dict, *files: Path) -> str:
        run = client.create_run(experiment, run_name=name, tags={"mlflow.parentRunId": parent}).info.run_id
        now = int(time.time() * 1000)
        client.log_batch(
            run,
            [Metric(k, float(v), now, 0) for k, v in metrics.items()],
            [Param(k, str(v)[:500]) for k, v in params.items()],
        )
        for file in files:
            (client.log_artifacts if file.is_dir() else client.log_artifact)(run, str(file))
        client.set_terminated(run)
        return run

    # ingest and validate
    rows = read(config.source, outcome=True)
    frozen = snapshot(rows.frame, Artifacts(own.artifacts_url))
    log("ingest", {"source": config.source}, {"rows": len(rows.frame)})
    verdict = judge(rows.frame, rows.origin, rows.rejected, config.data.max_quarantined).require(
        config.source
    )
    verdict.quarantined.to_csv(out / "quarantine.csv", index=False)
    verdict.warned.to_csv(out / "warnings.csv", index=False)
    outcome = verdict.accepted["survived"].to_numpy(int)
    refuse_revealing(verdict.accepted, outcome, verdict.accepted["ticket"].to_numpy(str))
    data_docs(verdict.accepted, out / "data_docs")
    passengers = canonical(verdict.accepted)
    log("validate", {}, {"accepted": len(passengers)}, out / "data_docs", out / "quarantine.csv")

    # train
    held_out = holdout_mask(passengers["ticket"], config.split.holdout, config.split.salt)
    training = passengers[~held_out].reset_index(drop=True)
    holdout = passengers[held_out].reset_index(drop=True)
    y, ticket = training["survived"].to_numpy(int), training["ticket"].to_numpy(str)
    figures, models, candidates, oof, inside, losses = {}, {}, {}, {}, {}, {}
    folds, seed = config.cv.folds, config.seed
    for name, c in config.model.candidates.items():
        candidate = candidates[name] = Candidate(c.kind, c.hyperparameters, c.calibration, c.with_deck)
        oof[name] = cross_validate(candidate, training, folds, config.cv.repeats, seed)
        wide = oof[name].pivot(index="row", columns="repeat", values="probability").to_numpy()
        figures[name], losses[name] = estimate(y, wide, ticket, seed=seed), surprises(y, wide)
        if config.cv.inner and folds > 2:
            inside[name] = inner_validate(candidate, training, folds, inner=config.cv.inner, seed=seed)
        person = people(passengers)
        refuse_shared(passengers, np.where(held_out, "hold-out", "training"), person)
        for _, repeat in oof[name].groupby("repeat"):
            refuse_shared(training, repeat.sort_values("row")["fold"].to_numpy(), person[~held_out])
        refuse_revealing(feature_frame(training)[[*NUMERIC, *CATEGORICAL]], y, ticket, single=False)
        fit_rows = oof[name].query("repeat == 0 and fold != 0")["row"].to_numpy()
        refuse_peeking(lambda t, rows, own=candidate: fit_on(own, t, rows, seed), training, fit_rows)
        models[name] = fit(candidate, feature_frame(training), y, ticket, seed)
        log(f"train.{name}", candidate.settings, {k: e.value for k, e in figures[name].items()})

    # evaluate
    sizes = {name: size_of(one) for name, one in models.items()}
    choice = choose(losses, sizes, ticket)
    whole = nested(oof, inside, sizes, y, ticket, seed) if inside else None
    chosen = choice.chosen
    model = models[chosen]
    predict = lambda frame: probabilities(model, feature_frame(frame))
    evaluation = evaluate(chosen, figures, predict, training, holdout, config.seed)
    evaluation = evaluation.model_copy(update={"choice": choice, "nested": whole})
    evaluation = examine(evaluation, candidates[chosen], predict, oof[chosen], training, holdout)
    drawn = ("candidates", "roc", "calibration", "recalibration", "learning", "fairness", "sensitivity")
    drawn += ("slices", "confusion", "importance")
    for name in drawn:
        (out / f"{name}.png").write_bytes(getattr(plots, f"plot_{name}")(evaluation).png())
    found = {k: e.value for k, e in evaluation.holdout.items()}
    log("evaluate", {"seed": config.seed}, found, *(out / f"{name}.png" for name in drawn))

    # promote
    c = config.model.candidates[chosen]
    trained = {
        "name": chosen,
        "kind": c.kind,
        "calibration": c.calibration,
        "with_deck": c.with_deck,
        "hyperparameters": Candidate(c.kind, c.hyperparameters).settings,
    }
    split = {"share": config.split.holdout, "salt": config.split.salt}
    info = describe(trained, evaluation, feature_frame(training), split)
    lineage = Lineage(git_commit="", snapshot=frozen.id, data_sha256=frozen.sha256, seed=config.seed)
    write_bundle(out / "bundle", to_onnx(model, c.with_deck), info, lineage)
    bundle = Bundle(out / "bundle")
    require_parity(bundle.session, model, feature_frame(passengers))
    X = feature_frame(passengers)
    again = fit(
        candidates[chosen], feature_frame(training), y, ticket, seed
    )  # the gate fits the recipe again
    evidence = conditions.Evidence(
        passengers,
        held_out,
        evaluation.holdout,
        evaluation.baselines,
        figures[chosen]["log_loss"],
        probabilities(model, X),
        probabilities(again, X),
        given=conditions.leak_conditions(passengers, held_out),
    )
    policy = Policy(**config.gate.model_dump())
    decision = conditions.examine(conditions.Contender.of(bundle, X), None, evidence, policy, seed=seed)
    registry = Registry(own, client)
    version = registry.register(bundle, log("promote", {}, {"promoted": decision.promote}, out / "bundle"))
    registry.promote(version, registry.alias(CHAMPION), "first", decision.reason)

    # score and report
    p = bundle.predict(verdict.accepted)
    verdict.origin.assign(name=verdict.accepted["name"], probability=p).to_csv(
        out / "scored.csv", index=False
    )
    log("score", {}, {"scored": len(p)}, out / "scored.csv")
    report = Report(
        title="Who survives the Titanic?",
        run={"run": parent},
        quality=Quality(
            source=config.source,
            snapshot=frozen.id,
            data_sha256=frozen.sha256,
            read=verdict.read,
            accepted=len(verdict.accepted),
            set_aside=verdict.set_aside,
            table=[TableRule(**vars(rule)) for rule in verdict.table],
            missing=verdict.accepted.isna().mean().to_dict(),
            quarantined=[],
            quarantined_total=0,
        ),
        evaluation=evaluation,
        decision=decision,
        champion=Champion(
            model=version.model,
            version=version.number,
            alias=CHAMPION,
            candidate=chosen,
            digest=version.digest,
            git_commit="",
            snapshot=frozen.id,
            data_sha256=frozen.sha256,
            seed=config.seed,
        ),
        scored=Scored(
            file="scored.csv", rows=len(p), survivors=int((p > 0.5).sum()), mean_probability=float(p.mean())
        ),
        steps=[],
    )
    (out / "report.html").write_text(render_report(report))
    log("report", {}, {}, out / "report.html")
    client.set_terminated(parent)
    print(json.dumps({"seconds": round(time.perf_counter() - START, 3), "log_loss": found["log_loss"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
