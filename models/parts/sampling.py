"""What speaking is made of whatever the backbone: further tries, and audio in chunks that grow."""


def takes(model, requests, s, failed):
    """Yields (i, frame) of every request, as model._run does; s.retries times it runs again, with the next seed, for the
    requests of which failed(request, frames, finish) says so. The last take is kept; model.finish tells how each ended."""
    if not s.retries:  # frames come out while they are made
        yield from model._run(requests, s)
        return
    left, finish = list(range(len(requests))), ["cap"] * len(requests)
    for attempt in range(s.retries + 1):
        frames = {i: [] for i in left}
        tried = [dict(requests[i], seed=None if requests[i]["seed"] is None else requests[i]["seed"] + attempt) for i in left]
        for k, frame in model._run(tried, s):
            frames[left[k]].append(frame)
        for k, i in enumerate(left):
            finish[i] = model.finish[k]
        again = [i for i in left if attempt < s.retries and failed(requests[i], frames[i], finish[i])]
        yield from ((i, frame) for i in left if i not in again for frame in frames[i])
        left = again
        if not left:
            break
    model.finish = finish


def chunks(frames, streams, join, most):
    """Audio (i, (n,)) of frames (i, frame): 1, 2, 4 .. `most` frames at a time, joined by `join`, through the codec stream of
    their request. What a codec's call costs is mostly fixed, but the first sound should come at once."""
    waiting, size = [[] for _ in streams], [1] * len(streams)
    for i, frame in frames:
        waiting[i].append(frame)
        if len(waiting[i]) >= size[i]:
            yield i, streams[i].decode(join(waiting[i])).cpu()
            waiting[i], size[i] = [], min(2 * size[i], most)
    for i, rest in enumerate(waiting):
        if rest:
            yield i, streams[i].decode(join(rest)).cpu()
