from for_ray.datasets.labelled import Ragged
from for_ray.stages.training_measures import most_frequent


def test_the_most_frequent_names_are_kept_and_numbered_anew() -> None:
    lists = Ragged.of([[7, 3], [], [3, 9], [9, 3, 2]])
    names, kept = most_frequent(lists, 2)
    assert names.tolist() == [3, 9]
    assert [kept.row(row).tolist() for row in range(4)] == [[0], [], [0, 1], [0, 1]]
    every, whole = most_frequent(lists, 9)
    assert every.tolist() == [2, 3, 7, 9]
    assert [every[whole.row(row)].tolist() for row in range(4)] == [[3, 7], [], [3, 9], [2, 3, 9]]
