"""The engine: requests, block manager, scheduler, runner. The scheduler sees no tensor, the runner no request."""
