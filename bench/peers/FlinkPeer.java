import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Arrays;
import org.apache.flink.api.common.eventtime.WatermarkStrategy;
import org.apache.flink.api.common.functions.AggregateFunction;
import org.apache.flink.api.common.functions.OpenContext;
import org.apache.flink.api.common.serialization.AbstractDeserializationSchema;
import org.apache.flink.api.common.state.ValueState;
import org.apache.flink.api.common.state.ValueStateDescriptor;
import org.apache.flink.api.common.typeinfo.Types;
import org.apache.flink.api.java.tuple.Tuple2;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.connector.file.sink.FileSink;
import org.apache.flink.connector.kafka.source.KafkaSource;
import org.apache.flink.connector.kafka.source.enumerator.initializer.OffsetsInitializer;
import org.apache.flink.core.fs.Path;
import org.apache.flink.streaming.api.datastream.DataStream;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.streaming.api.functions.KeyedProcessFunction;
import org.apache.flink.streaming.api.functions.windowing.ProcessWindowFunction;
import org.apache.flink.streaming.api.windowing.assigners.TumblingEventTimeWindows;
import org.apache.flink.streaming.api.windowing.windows.TimeWindow;
import org.apache.flink.util.Collector;

/**
 * Both works in Flink's DataStream API, a MiniCluster in this JVM: a checkpoint every ten seconds, rows by its file
 * sink, exactly once. The source is bounded, so that the last windows close at its end.
 */
public final class FlinkPeer {
    /** bootstrap topic work out threads rocksdb|hashmap. */
    public static void main(String[] arguments) throws Exception {
        String out = arguments[3];
        Configuration settings = new Configuration();
        settings.setString("state.backend.type", arguments[5]);
        settings.setString("execution.checkpointing.interval", "10 s");
        settings.setString("execution.checkpointing.dir", "file://" + out + "/checkpoints");
        settings.setString("execution.checkpointing.incremental", "true");
        settings.setString("io.tmp.dirs", out + "/home/tmp");
        settings.setString("taskmanager.memory.managed.size", "512m");
        settings.setString("pipeline.object-reuse", "true");
        settings.setString("pipeline.generic-types", "false");
        StreamExecutionEnvironment flink =
            StreamExecutionEnvironment.createLocalEnvironment(Integer.parseInt(arguments[4]), settings);
        KafkaSource<Reading> source = KafkaSource.<Reading>builder()
            .setBootstrapServers(arguments[0])
            .setTopics(arguments[1])
            .setStartingOffsets(OffsetsInitializer.earliest())
            .setBounded(OffsetsInitializer.latest())
            .setValueOnlyDeserializer(new Decoder())
            .build();
        boolean isDeltas = arguments[2].equals("deltas");
        WatermarkStrategy<Reading> clock = isDeltas
            ? WatermarkStrategy.noWatermarks()
            : WatermarkStrategy.<Reading>forBoundedOutOfOrderness(Duration.ofMinutes(30))
                .withTimestampAssigner((reading, stamp) -> reading.observedUs / 1000);
        var readings = flink.fromSource(source, clock, "readings").keyBy(reading -> reading.meter);
        DataStream<String> rows = isDeltas
            ? readings.process(new Deltas())
            : readings.window(TumblingEventTimeWindows.of(Duration.ofMinutes(10))).aggregate(new Merge(), new Rows());
        rows.sinkTo(FileSink.<String>forRowFormat(
            new Path("file://" + out + "/rows"),
            (text, stream) -> stream.write(text.getBytes(StandardCharsets.ISO_8859_1))).build());
        flink.execute();
        System.exit(0);
    }

    static final class Decoder extends AbstractDeserializationSchema<Reading> {
        @Override
        public Reading deserialize(byte[] bytes) {
            Reading reading = Reading.decode(bytes);
            Reading.Progress.one();
            return reading;
        }
    }

    static final class Deltas extends KeyedProcessFunction<String, Reading, String> {
        private final StringBuilder row = new StringBuilder();
        private transient ValueState<Tuple2<Long, Long>> last;

        @Override
        public void open(OpenContext context) {
            last = getRuntimeContext().getState(new ValueStateDescriptor<>("last", Types.TUPLE(Types.LONG, Types.LONG)));
        }

        @Override
        public void processElement(Reading reading, Context context, Collector<String> out) throws Exception {
            Tuple2<Long, Long> known = last.value();
            long lastUs = known == null ? Reading.ABSENT : known.f0;
            row.setLength(0);
            Reading.delta(row, reading, lastUs, known == null ? 0 : known.f1);
            out.collect(row.toString());
            if (reading.observedUs > lastUs) {
                last.update(Tuple2.of(reading.observedUs, reading.wh));
            }
        }
    }

    /** What a window of a meter holds: count, least, largest and sum of each phase, then the times seen. */
    static final class Merge implements AggregateFunction<Reading, long[], long[]> {
        static final int OF_A_PHASE = 4;
        static final int TIMES = 3 * OF_A_PHASE;

        @Override
        public long[] createAccumulator() {
            return new long[TIMES];
        }

        @Override
        public long[] add(Reading reading, long[] held) {
            for (int at = TIMES; at < held.length; at++) {
                if (held[at] == reading.observedUs) {
                    return held;
                }
            }
            long[] more = Arrays.copyOf(held, held.length + 1);
            more[held.length] = reading.observedUs;
            for (int phase = 0; phase < 3; phase++) {
                long mv = reading.voltage(phase);
                if (mv != Reading.ABSENT) {
                    int at = phase * OF_A_PHASE;
                    boolean isFirst = more[at]++ == 0;
                    more[at + 1] = isFirst ? mv : Math.min(mv, more[at + 1]);
                    more[at + 2] = isFirst ? mv : Math.max(mv, more[at + 2]);
                    more[at + 3] += mv;
                }
            }
            return more;
        }

        @Override
        public long[] getResult(long[] held) {
            return held;
        }

        @Override
        public long[] merge(long[] one, long[] other) {
            throw new UnsupportedOperationException("tumbling windows do not merge");
        }
    }

    static final class Rows extends ProcessWindowFunction<long[], String, String, TimeWindow> {
        @Override
        public void process(String meter, Context context, Iterable<long[]> windows, Collector<String> out) {
            StringBuilder row = new StringBuilder();
            for (long[] held : windows) {
                for (int phase = 0; phase < 3; phase++) {
                    int at = phase * Merge.OF_A_PHASE;
                    if (held[at] > 0) {
                        Reading.window(row, meter, phase, context.window().getStart() * 1000, held[at], held[at + 1],
                            held[at + 2], held[at + 3]);
                    }
                }
            }
            out.collect(row.toString());
        }
    }

    private FlinkPeer() {}
}
