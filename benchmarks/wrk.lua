-- Sends the bodies of a file, one a line, in order; prints one line of JSON. Arguments after `--`: the path of the file.
local bodies, next_body = {}, 0
wrapped = 0 -- global: thread:get reads it
local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init(arguments)
   for line in io.lines(arguments[1]) do
      bodies[#bodies + 1] = wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, line)
   end
end

function request()
   if next_body == #bodies then
      next_body, wrapped = 0, 1
   end
   next_body = next_body + 1
   return bodies[next_body]
end

function done(summary, latency, requests)
   local again = 0
   for _, thread in ipairs(threads) do
      again = again + (thread:get("wrapped") or 0)
   end
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "duration_us": %d, "failed": %d, "again": %d, "p50_us": %d, "p90_us": %d, "p99_us": %d, "max_us": %d}\n',
      summary.requests, summary.duration,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout, again,
      latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
