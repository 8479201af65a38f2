// Command clientv3 writes to an etcd with etcd's own client, as fast as it is let, and says how fast that was.
//
//	clientv3 --endpoint URL [--writers 16] [--seconds 2] [--warmup 0.5] [--size 128]
//
// Each writer puts one key after the other, each of its own, and waits for each to be committed. It prints one JSON
// object: the commits between warm-up and end, and the quantiles of what each took; all_commits has the others, too.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "clientv3:", err)
		os.Exit(1)
	}
}

func quantile(sorted []float64, share float64) float64 {
	return sorted[int(share*float64(len(sorted)-1)+0.5)]
}

func main() {
	endpoint := flag.String("endpoint", "", "client URL of the leader")
	writers := flag.Int("writers", 16, "puts at once")
	seconds := flag.Float64("seconds", 2, "of the measured run")
	warmup := flag.Float64("warmup", 0.5, "seconds before it")
	size := flag.Int("size", 128, "bytes of each value")
	flag.Parse()

	client, err := clientv3.New(clientv3.Config{Endpoints: []string{*endpoint}, DialTimeout: 10 * time.Second})
	check(err)
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	value := strings.Repeat("x", *size)
	begin := time.Now().Add(time.Duration(*warmup * 1e9))
	end := begin.Add(time.Duration(*seconds * 1e9))
	times := make([][]float64, *writers) // us, of each writer
	var group sync.WaitGroup
	var total atomic.Int64
	for writer := range *writers {
		group.Go(func() {
			for n := 0; ; n++ {
				start := time.Now()
				if !start.Before(end) {
					return
				}
				_, err := client.Put(ctx, fmt.Sprintf("%d/%d", writer, n), value)
				check(err)
				total.Add(1)
				// A put counts where it ends, so that there are as many in the time as were committed in it.
				if done := time.Now(); done.After(begin) && done.Before(end) {
					times[writer] = append(times[writer], float64(done.Sub(start).Nanoseconds())/1e3)
				}
			}
		})
	}
	group.Wait()
	all := slices.Concat(times...)
	slices.Sort(all)
	if len(all) == 0 {
		check(fmt.Errorf("nothing was committed in %g s", *seconds))
	}
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"commits":       len(all),
		"all_commits":   total.Load(),
		"commits_per_s": float64(len(all)) / *seconds,
		"p50_us":        quantile(all, 0.50),
		"p99_us":        quantile(all, 0.99),
	}))
}
