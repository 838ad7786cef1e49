"""The search service: an index behind HTTP, with a page for people.

    current = Current(open_snapshot, latest_id, refresh_seconds=10)
    app = make_app(Service("photos", current, list_snapshots))
    current.start()

`make_app` knows no server, `Current` switches to a new snapshot between two questions, `Client` asks from
afar.
"""
