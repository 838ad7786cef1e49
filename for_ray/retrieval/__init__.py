"""Questions to an index: words, pictures or objects → ranked images with boxes; for the command and services.

    index = open_index("s3://bucket/photos.index")
    answer = index.ask(Question(text="a dog AND a frisbee NOT a car", k=20))
    more = index.ask(Question(text="a dog AND a frisbee NOT a car", k=20, page=answer.next_page))

`grammar` says how words are read, `Question` what else can be asked, `Answer` what comes back.
"""

from for_ray.retrieval.grammar import QuestionError
from for_ray.retrieval.opened import OpenIndex, check_index, open_index, snapshot_of_page
from for_ray.retrieval.queries import PictureError, check_question
from for_ray.retrieval.question import FOLD_AT, MAX_HITS, Answer, Filters, Found, Hit, Question
from for_ray.retrieval.rows import StoredImage, StoredObjects
from for_ray.retrieval.sheets import check_sheet, read_example

__all__ = [
    "FOLD_AT",
    "MAX_HITS",
    "Answer",
    "Filters",
    "Found",
    "Hit",
    "OpenIndex",
    "PictureError",
    "Question",
    "QuestionError",
    "StoredImage",
    "StoredObjects",
    "check_index",
    "check_question",
    "check_sheet",
    "open_index",
    "read_example",
    "snapshot_of_page",
]
