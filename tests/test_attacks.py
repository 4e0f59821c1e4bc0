"""What a user may hand over: the named cases of attacks.py and a few of the drawn ones; tests/stress.py draws thousands."""
import pytest

import attacks


@pytest.mark.parametrize("what, count", [("tables", 110), ("pictures", 160), ("weight_files", 520)])
def test_bad_input_is_refused_in_one_line_and_good_input_works(what, count, pipeline_folder, tmp_path):
    counts, wrong = getattr(attacks, what)(tmp_path, range(count), **({"pipeline": pipeline_folder} if what == "weight_files" else {}))
    assert not wrong, "\n".join(problem[-900:] for problem in wrong)
    assert counts["worked"] + counts["refused"] == count and min(counts["worked"], counts["refused"]) > 20
