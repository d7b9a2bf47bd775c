"""What is deployed and what runs, in words."""

from __future__ import annotations

from flowsentry.serving.deployer import Deployed, Service, Status


def describe(status: Status) -> str:
    """A status for people."""
    record = status.record
    lines = [_line("champion", record.champion, status.champion)]
    if status.running:
        lines.append(f"  address     {status.url}")
        if status.champion is not None:
            lines.append(f"  log         {status.champion.log}")
    elif record.champion is not None:
        lines.append("  nothing runs; `python -m flowsentry start` brings it back")
    if record.champion is None:
        lines.append("  nothing is deployed; `python run.py --pipeline train` deploys")
    lines.append(_line("previous", record.previous, None))
    lines.append(_line("challenger", record.challenger, status.challenger))
    if status.challenger is not None:
        lines += [f"  address     {status.challenger.url}", f"  log         {status.challenger.log}"]
    return "\n".join(lines)


def _line(role: str, deployed: Deployed | None, service: Service | None) -> str:
    if deployed is None and service is None:
        return f"{role:12}none"
    parts = [f"model version {deployed.model_version}, bundle {deployed.digest[:12]}" if deployed else "not recorded"]
    if service is not None:
        parts.append("healthy" if service.healthy else service.state)
        if service.pid is not None:
            parts.append(f"process {service.pid}, up {service.uptime:.0f} s")
        if service.restarts:
            parts.append(f"restarted {service.restarts} times")
        if service.problem:
            parts.append(service.problem if service.healthy is False else f"last {service.problem}")
    return f"{role:12}{'; '.join(parts)}"
