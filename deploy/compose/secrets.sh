#!/bin/sh
# Makes the passwords and keys of the compose stack in deploy/compose/secrets/, at random; what is there already stays.
# The directory is for its owner alone; the files in it can be read by the containers' users, who are none of this machine's.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
cd secrets

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { if [ -e "$1" ]; then cat >/dev/null; else cat >"$1"; fi; chmod 0644 "$1"; }
entry() { printf '[{"name":"%s","sha256":"%s","scopes":[%s]}]\n' "$1" "$(printf %s "$2" | sha256sum | cut -d' ' -f1)" "$3"; }

random | keep postgres_password
random | keep grafana_password
random | keep redis_password
random | keep client_key
random | keep peer_key

# The rest follows from those.
printf 'requirepass %s\n' "$(cat redis_password)" >redis.conf
printf 'REDIS_URL=redis://:%s@redis:6379/0\n' "$(cat redis_password)" >redis.env
printf 'SEARCH_LEDGER_URL=postgresql://tercet:%s@postgres:5432/tercet\n' "$(cat postgres_password)" >ledger.env
printf 'SEARCH_PEER_API_KEY=%s\n' "$(cat peer_key)" >peer.env
printf 'TERCET_API_KEY=%s\n' "$(cat client_key)" >client.env
entry client "$(cat client_key)" '"search","write"' >client_keys.json
entry search "$(cat peer_key)" '"admin"' >peer_keys.json
chmod 0644 redis.conf client_keys.json peer_keys.json
