#!/usr/bin/env bash
# A Docker engine on Debian where no image can be pulled: `tools/engine.sh start|stop|status`, as root.
#
# start: installs engine, compose and debootstrap from Debian, starts dockerd (never beside another one), and makes the
#        base image debian:bookworm-slim by debootstrap where there is none and none can be pulled.
# stop:  ends the dockerd that start began, and puts back what it changed: ip_forward and the FORWARD policy.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin  # where dockerd, debootstrap and iptables are; not on every user's path
STATE=/run/meterstream-engine
BASE=debian:bookworm-slim
DOCKER=/usr/bin/docker  # the distribution's own: it goes with its dockerd

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
answers() { [ -x "$DOCKER" ] && "$DOCKER" info >/dev/null 2>&1; }
forward_policy() { iptables -S FORWARD 2>/dev/null | sed -n 's/^-P FORWARD //p'; }

install_engine() {
  local missing=()
  for program in dockerd docker-compose debootstrap iptables; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  [ ${#missing[@]} -gt 0 ] || [ ! -x "$DOCKER" ] || return 0
  command -v apt-get >/dev/null || die "this needs Debian: there is no apt-get"
  [ "$(id -u)" = 0 ] || die "installing a Docker engine needs root"
  say "Installing docker.io, docker-compose, debootstrap"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    docker.io docker-compose debootstrap iptables ca-certificates >/dev/null
}

make_base() {
  "$DOCKER" image inspect "$BASE" >/dev/null 2>&1 && return 0
  timeout 180 "$DOCKER" pull -q "$BASE" >/dev/null 2>&1 && return 0
  command -v debootstrap >/dev/null || die "$BASE can neither be pulled nor made: install debootstrap"
  [ "$(id -u)" = 0 ] || die "making $BASE by debootstrap needs root"
  mkdir -p "$STATE"
  say "Making $BASE by debootstrap"
  local root
  root=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$root'" RETURN
  debootstrap --variant=minbase bookworm "$root" >"$STATE/debootstrap.log" 2>&1 \
    || die "debootstrap failed: see $STATE/debootstrap.log"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar -C "$root" -c . | "$DOCKER" import - "$BASE" >/dev/null
}

start() {
  answers || install_engine  # which may start one, where the system has a service manager
  if answers; then
    say "An engine answers already; stop leaves it alone."
  else
    [ "$(id -u)" = 0 ] || die "dockerd needs root"
    ! pgrep -x dockerd >/dev/null || die "a dockerd runs (pid $(pgrep -x dockerd | head -1)) and does not answer"
    mkdir -p "$STATE"
    cat /proc/sys/net/ipv4/ip_forward >"$STATE/ip_forward"
    forward_policy >"$STATE/forward"
    setsid dockerd >"$STATE/dockerd.log" 2>&1 </dev/null &
    echo $! >"$STATE/pid"
    for _ in $(seq 120); do
      answers && break
      kill -0 "$(cat "$STATE/pid")" 2>/dev/null || { restore; die "dockerd ended: $(tail -3 "$STATE/dockerd.log")"; }
      sleep 0.5
    done
    answers || { stop; die "dockerd does not answer after 60 s: see $STATE/dockerd.log"; }
    say "dockerd $("$DOCKER" version --format '{{.Server.Version}}') runs, pid $(cat "$STATE/pid")."
  fi
  make_base
}

restore() {
  [ -s "$STATE/ip_forward" ] && cat "$STATE/ip_forward" >/proc/sys/net/ipv4/ip_forward
  [ -s "$STATE/forward" ] && iptables -P FORWARD "$(cat "$STATE/forward")"
  rm -f "$STATE/pid" "$STATE/ip_forward" "$STATE/forward"
}

stop() {
  [ -s "$STATE/pid" ] || { say "No engine of ours runs."; return 0; }
  local pid
  pid=$(cat "$STATE/pid")
  # a pid that somebody else has by now is left alone
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] && kill -TERM "$pid"; then
    for _ in $(seq 120); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.5
    done
    ! kill -0 "$pid" 2>/dev/null || die "dockerd (pid $pid) did not end within 60 s"
  fi
  restore
  say "dockerd stopped."
}

status() {
  answers && say "An engine answers: $("$DOCKER" version --format '{{.Server.Version}}')." || die "no engine answers"
}

case "${1:-}" in
  start | stop | status) "$1" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
