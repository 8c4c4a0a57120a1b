"""A key `style` in manifests that VoxCPM's encode reads: it comes through manifest, cache and encode; rows
without it, and what was cached of them, stay what they were."""
import json
from pathlib import Path

import models
from models.parts.manifests import read_manifest
from prepare_data import ClipCache
from tests.forks import goes_on, run


def main():
    model = models.load("voxcpm_base")
    old = read_manifest(["rows.jsonl"])
    assert not ClipCache("cache_voxcpm", model).missing(old)  # nothing that was encoded is lost
    goes_on("voxcpm")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["style"] = "whispering"
    Path("styled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = ClipCache("cache_styled", model)
    styled = read_manifest(["styled.jsonl"])
    cache.add(styled, lambda line: None)
    before = ("(whispering)", "(whispering)", "", "")
    for row, style in zip(styled, before, strict=True):
        assert cache.get(row)["text"].tolist()[:-1] == model.encode_text(style + row["text"]), row
    trained = run("voxcpm.yaml", "--save_path", "styled", "--train_manifest", "styled.jsonl", "--num_iters", 1)
    assert len(trained) == 1


if __name__ == "__main__":
    main()
