// Command etcd measures etcd's own rafthttp pipeline, through its public API and by itself.
//
//	etcd send --url URL --body BYTES [--seconds S] [--warmup S] [--window 64] [--lone N] [--cert FILE --ca FILE]
//	etcd receive [--cert FILE --ca FILE]
//	etcd lead --peer URL [--kind msgapp] [--size 128] [--seconds S] [--warmup S] [--lone N] [--cert FILE --ca FILE]
//	etcd follow [--cert FILE --ca FILE]
//	etcd version
//
// send posts MsgSnap messages, which always take the pipeline (rafthttp/peer.go, pick), and learns from
// ReportSnapshot that one is through. A window of outstanding messages keeps the pipeline's buffer of 64 full but
// never over-full: a message too many would be dropped. Afterwards --lone messages are sent one at a time, which
// gives the time from Send to ReportSnapshot.
//
// receive serves Transport.Handler() to a Raft that does nothing, until stdin ends.
//
// lead and follow are the two ends of streams (streams.go).
//
// With --cert, a certificate and its key in one file, and --ca, which signed the other side's, both speak mutual TLS
// as etcd sets it up: rafthttp by its TLSInfo, the listener as embed does.
//
// Each prints one JSON object. CPU is user and system time of this process (getrusage); no CPU is spent before the
// first message that is not taken off. Memory is the peak above what there was before the first message, when the
// payload was already there.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	stats "go.etcd.io/etcd/server/v3/etcdserver/api/v2stats"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// The same IDs as every other subject: the sink's answer names this cluster.
const (
	memberID  = types.ID(0x8e9e05c52164694d)
	peerID    = types.ID(0xce2a822cea30bfca)
	clusterID = types.ID(0xcdf818194e3a8c32)
	term      = 7
)

// quietRaft does nothing but count, and passes on what the pipeline reports of a snapshot.
type quietRaft struct {
	processed   atomic.Uint64
	unreachable atomic.Uint64
	finished    chan raft.SnapshotStatus
}

func (r *quietRaft) Process(context.Context, raftpb.Message) error {
	r.processed.Add(1)
	return nil
}

func (r *quietRaft) IsIDRemoved(uint64) bool { return false }

func (r *quietRaft) ReportUnreachable(uint64) { r.unreachable.Add(1) }

func (r *quietRaft) ReportSnapshot(_ uint64, status raft.SnapshotStatus) { r.finished <- status }

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
}

// tlsFlags adds the two files to a command's flags; what they make is nil without them.
func tlsFlags(flags *flag.FlagSet) func() *transport.TLSInfo {
	cert := flags.String("cert", "", "certificate and key")
	ca := flags.String("ca", "", "authority of the other side")
	return func() *transport.TLSInfo {
		if *cert == "" {
			return nil
		}
		return &transport.TLSInfo{CertFile: *cert, KeyFile: *cert, TrustedCAFile: *ca, ClientCertAuth: true}
	}
}

// noStreams is how often the stream readers dial a sink, which has no streams, after the first time: not during the
// run, where it would be charged to the pipeline.
var noStreams = rate.Every(time.Hour)

func newTransport(id types.ID, r rafthttp.Raft, tls *transport.TLSInfo, dials rate.Limit) *rafthttp.Transport {
	tr := &rafthttp.Transport{
		// A logger that writes nothing is the cheapest one there can be.
		Logger:             zap.NewNop(),
		DialRetryFrequency: dials,
		ID:                 id,
		ClusterID:          clusterID,
		Raft:               r,
		ServerStats:        stats.NewServerStats("", ""),
		LeaderStats:        stats.NewLeaderStats(zap.NewNop(), id.String()),
		ErrorC:             make(chan error, 1),
	}
	if tls != nil {
		tr.TLSInfo = *tls
	}
	check(tr.Start())
	return tr
}

func cpuSeconds() float64 {
	var ru syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &ru))
	return float64(ru.Utime.Nano()+ru.Stime.Nano()) / 1e9
}

// statusKiB reads one line of /proc/self/status, such as VmRSS or VmHWM.
func statusKiB(name string) float64 {
	text, err := os.ReadFile("/proc/self/status")
	check(err)
	_, rest, _ := strings.Cut(string(text), "\n"+name+":")
	value, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	check(err)
	return value
}

// forgetPeak makes VmHWM count from here on; where the kernel refuses, from the start of the process.
func forgetPeak() { _ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) }

// snapshotOf makes a MsgSnap that is exactly body bytes long on the wire.
func snapshotOf(body int) raftpb.Message {
	m := raftpb.Message{
		Type: raftpb.MsgSnap, To: uint64(peerID), From: uint64(memberID), Term: term,
		Snapshot: &raftpb.Snapshot{Metadata: raftpb.SnapshotMetadata{Index: 1, Term: term}},
	}
	m.Snapshot.Data = make([]byte, body)
	for range 8 { // the lengths before the data have lengths of their own
		m.Snapshot.Data = m.Snapshot.Data[:len(m.Snapshot.Data)+body-m.Size()]
	}
	if m.Size() != body {
		check(fmt.Errorf("a MsgSnap of exactly %d bytes cannot be made", body))
	}
	for i := range m.Snapshot.Data {
		m.Snapshot.Data[i] = 'x' // memory that was never written is not there yet
	}
	return m
}

type sender struct {
	tr      *rafthttp.Transport
	raft    *quietRaft
	batch   []raftpb.Message // one message, offered again and again: Send copies its struct
	through uint64
}

func (s *sender) await() {
	if status := <-s.raft.finished; status != raft.SnapshotFinish {
		check(fmt.Errorf("a message was not delivered, %d were", s.through))
	}
	s.through++
}

// run keeps window messages outstanding until the deadline, and waits for none of them.
func (s *sender) run(outstanding, window int, deadline time.Time) int {
	for time.Now().Before(deadline) {
		for ; outstanding < window; outstanding++ {
			s.tr.Send(s.batch)
		}
		s.await()
		outstanding--
		for ; outstanding > 0 && len(s.raft.finished) > 0; outstanding-- {
			s.await()
		}
	}
	return outstanding
}

func quantile(sorted []float64, share float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(share*float64(len(sorted)-1)+0.5)]
}

func send(args []string) any {
	flags := flag.NewFlagSet("send", flag.ExitOnError)
	url := flags.String("url", "", "where the receiver is")
	body := flags.Int("body", 172, "bytes of each message on the wire")
	seconds := flags.Float64("seconds", 2, "of the measured run")
	warmup := flags.Float64("warmup", 0.3, "seconds before it")
	window := flags.Int("window", 64, "messages outstanding")
	lone := flags.Int("lone", 1000, "messages sent one at a time afterwards")
	tls := tlsFlags(flags)
	check(flags.Parse(args))

	r := &quietRaft{finished: make(chan raft.SnapshotStatus, 128)}
	s := &sender{tr: newTransport(memberID, r, tls(), noStreams), raft: r, batch: []raftpb.Message{snapshotOf(*body)}}
	s.tr.AddPeer(peerID, []string{*url})
	runtime.GC()
	time.Sleep(50 * time.Millisecond) // the streams' refused dials are over
	rss := statusKiB("VmRSS")
	forgetPeak()

	outstanding := s.run(0, *window, time.Now().Add(time.Duration(*warmup*1e9)))
	// As many are outstanding at the end as there are here, so this counts messages that are through.
	start, startCPU, startThrough := time.Now(), cpuSeconds(), s.through
	outstanding = s.run(outstanding, *window, start.Add(time.Duration(*seconds*1e9)))
	took, tookCPU := time.Since(start).Seconds(), cpuSeconds()-startCPU
	messages := s.through - startThrough
	for ; outstanding > 0; outstanding-- {
		s.await()
	}
	peak := statusKiB("VmHWM")

	times := make([]float64, *lone)
	for i := range times {
		offered := time.Now()
		s.tr.Send(s.batch)
		s.await()
		times[i] = float64(time.Since(offered).Nanoseconds()) / 1e3
	}
	slices.Sort(times)
	if n := r.unreachable.Load(); n != 0 {
		check(fmt.Errorf("%d messages failed", n))
	}
	s.tr.Stop()
	return map[string]any{
		"messages": messages, "seconds": took, "total": s.through,
		"msgs_per_s":           float64(messages) / took,
		"cpu_us_per_msg":       tookCPU * 1e6 / float64(messages),
		"p50_us":               quantile(times, 0.50),
		"p99_us":               quantile(times, 0.99),
		"rss_above_payload_mb": (peak - rss) * 1024 / 1e6,
	}
}

// listen serves a handler at a port of the kernel's choice, as embed does, until the process ends.
func listen(handler http.Handler, tls *transport.TLSInfo) int {
	scheme := "http"
	if tls != nil {
		scheme = "https"
	}
	listener, err := transport.NewListener("127.0.0.1:0", scheme, tls)
	check(err)
	go func() { _ = (&http.Server{Handler: handler}).Serve(listener) }()
	return listener.Addr().(*net.TCPAddr).Port
}

func receive(args []string) any {
	flags := flag.NewFlagSet("receive", flag.ExitOnError)
	tls := tlsFlags(flags)
	check(flags.Parse(args))

	r := &quietRaft{}
	tr := newTransport(memberID, r, tls(), noStreams)
	port := listen(tr.Handler(), tls())
	runtime.GC()
	rss, startCPU := statusKiB("VmRSS"), cpuSeconds()
	forgetPeak()
	fmt.Println("listening", port)
	_, err := io.Copy(io.Discard, os.Stdin)
	check(err)
	total := r.processed.Load()
	return map[string]any{
		"total":   total,
		"cpu_s":   cpuSeconds() - startCPU,
		"peak_mb": (statusKiB("VmHWM") - rss) * 1024 / 1e6,
	}
}

func main() {
	var result any
	switch {
	case len(os.Args) > 1 && os.Args[1] == "send":
		result = send(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "receive":
		result = receive(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "lead":
		result = lead(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "follow":
		result = follow(os.Args[2:])
	case len(os.Args) == 2 && os.Args[1] == "version":
		result = map[string]any{"go": runtime.Version()}
	default:
		fmt.Fprintln(os.Stderr, "usage: etcd send --url URL ... | receive ... | lead --peer URL ... | follow ... | version")
		os.Exit(2)
	}
	check(json.NewEncoder(os.Stdout).Encode(result))
}
