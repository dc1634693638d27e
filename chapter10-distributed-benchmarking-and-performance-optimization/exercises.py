"""Chapter 10's exercise. Fill in the function, then grade yourself:

    pytest tests/chapter10/test_exercises.py --mine

Import what you need: the standard library is enough.
"""


def latencies_from_send_and_schedule(
    schedule: list[float], service: list[float], connections: int
) -> tuple[list[float], list[float]]:
    """Return what a load generator says of its requests, and what their users have felt. Section 10.1.

    Request i is due at schedule[i] seconds; the schedule does not fall. The generator has so many
    connections, and a request takes one of them for service[i] seconds. Requests are sent in their
    order, each at the moment when it is due, or, if no connection is free by then, as soon as one is.
    The order in which connections come free is that of their requests' ends, not that of the sends.

    Two lists, in the order of the requests: seconds from each one's send to its end, as a closed loop
    reports it, and seconds from the moment that it was due to its end.

    Raises ValueError if the lists differ in length, if there is no connection, or if the schedule falls.

    Cost: 150,000 requests on a thousand connections in less than two seconds, so do not look through
    all connections for each request.
    """
    raise NotImplementedError
