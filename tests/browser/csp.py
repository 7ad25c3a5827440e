"""The strictest policy that a site can have, for the pages of the admin in the tests."""

POLICY = "default-src 'self'"


def strict_csp(get_response):
    """Middleware: let a page load files of this site only, and run and style nothing inline."""

    def middleware(request):
        response = get_response(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return middleware
